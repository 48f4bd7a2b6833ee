"""unsharp.SAM in a loop of your own: BatchNorm, dropout, bf16 autocast, accumulation, clipping, a scheduler, a mask.

python examples/sam_in_your_loop.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import unsharp


def main() -> None:
    """Train the last layer's weights only, by ASAM; show that all others stand still, to the bit."""
    torch.manual_seed(0)
    digits = load_digits()
    inputs = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(1024, 10),
    )
    before = [p.detach().clone() for p in model.parameters()]

    # One 0/1 tensor for each parameter, in their order. A coordinate at 0 never moves, whatever momentum or decay say.
    mask = [torch.full_like(p, name.startswith("5."), dtype=torch.bool) for name, p in model.named_parameters()]
    epochs, batch_size, micro = 4, 256, 128
    optimizer = unsharp.SAM(
        model.parameters(), torch.optim.SGD, rho=0.5, adaptive=True, mask=mask, lr=0.05, momentum=0.9, weight_decay=5e-4
    )
    # Schedulers, state_dict and param_groups are those of the base optimiser.
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)

    loss = torch.tensor(0.0)
    for _ in range(epochs):
        model.train()
        for chosen in torch.randperm(len(labels)).split(batch_size):
            parts = chosen.split(micro)

            # The closure runs the whole step, all micro-batches of it; it is called twice.
            def closure(parts: tuple[Tensor, ...] = parts, n: int = len(chosen)) -> Tensor:
                optimizer.zero_grad()
                total = torch.zeros(())
                for part in parts:
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        logits = model(inputs[part])
                        term = nn.functional.cross_entropy(logits, labels[part], reduction="sum") / n
                    term.backward()
                    total = total + term.detach()
                return total

            loss = optimizer.step(closure, clip_norm=1.0)
        scheduler.step()

    model.eval()
    with torch.no_grad():
        accuracy = (model(inputs).argmax(1) == labels).float().mean()
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before)]
    # BatchNorm counted each batch once for every micro-batch, not twice: the second pass leaves no trace.
    counted = int(model.get_buffer("1.num_batches_tracked"))
    print(f"loss {float(loss):.3f}, accuracy {float(accuracy):.3f}, BatchNorm counted {counted} batches")
    for (name, _), has_moved in zip(model.named_parameters(), moved):
        print(f"{name:>9}  {'moved' if has_moved else 'stands still'}")


if __name__ == "__main__":
    main()
