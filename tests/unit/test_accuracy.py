"""Predictions, accuracy, loss, and the set of results as a whole."""

import numpy as np
import pytest
import torch
from torch import nn

from unsharp.data import TensorSamples
from unsharp.errors import UserError
from unsharp.evaluation import METRICS, Evidence, Outputs, Predictions, attacks, gap, measure, predict, reasons
from unsharp.evaluation.accuracy import ROWS, accuracy, by_sample, correctness, cross_entropies, mean_cross_entropy

GROUPS = {"mia", "divergence", "calibration", "per_class"}
KEYS = {
    "retain_accuracy",
    "forget_accuracy",
    "test_accuracy",
    "retain_loss",
    "forget_loss",
    "test_loss",
    "tow",
    "tow_signed",
    *GROUPS,
}
QUICK = ("threshold_confidence", "svc_correctness")


def drawn(n: int, k: int = 5, seed: int = 0, scale: float = 3.0) -> Predictions:
    draw = np.random.default_rng(seed)
    return Predictions(draw.normal(0, scale, (n, k)), draw.integers(0, k, n))


def outputs(seed: int, test: bool = True) -> Outputs:
    labels = [np.random.default_rng(1).integers(0, 5, n) for n in (60, 20, 40)]
    logits = [np.random.default_rng([seed, i]).normal(0, 3, (len(y), 5)) for i, y in enumerate(labels)]
    retain, forget, tested = (Predictions(z, y) for z, y in zip(logits, labels))
    return Outputs(retain, forget, tested if test else None)


def test_accuracy_and_loss_equal_torch() -> None:
    predictions = drawn(300)
    logits, labels = torch.from_numpy(predictions.logits), torch.from_numpy(predictions.labels)
    assert accuracy(predictions) == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item(), rel=1e-12)
    expected = nn.functional.cross_entropy(logits.double(), labels).item()
    assert mean_cross_entropy(predictions) == pytest.approx(expected, rel=1e-12)


def test_loss_is_finite_and_exact_on_extreme_logits() -> None:
    predictions = Predictions([[1e4, -1e4, 0], [-1e4, 1e4, 0], [3e38, -3e38, 0]], [1, 1, 0])
    assert cross_entropies(predictions.logits, predictions.labels) == pytest.approx([2e4, 0, 0])


def test_blocks_of_rows_change_nothing() -> None:
    predictions = drawn(ROWS + 7, k=2)
    whole = cross_entropies(predictions.logits, predictions.labels)
    assert np.array_equal(by_sample(cross_entropies, predictions), whole)


@pytest.mark.parametrize(
    ("logits", "labels", "words"),
    [
        (np.zeros((3, 2)), [0, 1, 2], "labels must lie in [0, 2), the classes of the network; got 2"),
        (np.zeros((3, 2)), [0, -1, 1], "got -1"),
        (np.zeros((3, 2)), [0, 1], "one per row"),
        (np.zeros((3, 1)), [0, 0, 0], "K ≥ 2"),
        (np.zeros((0, 2)), [], "n ≥ 1"),
        ([[0, 1], [np.nan, 1], [np.inf, 0]], [0, 1, 1], "2 of 3 samples are NaN or infinite (first at row 1)"),
    ],
)
def test_bad_predictions_are_refused(logits: object, labels: object, words: str) -> None:
    with pytest.raises(UserError) as error:
        Predictions(np.asarray(logits), np.asarray(labels))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_predictions_come_back_from_a_file(tmp_path) -> None:
    predictions, path = drawn(9), tmp_path / "test.safetensors"
    predictions.save(path)
    again = Predictions.load(path)
    assert np.array_equal(again.logits, predictions.logits)
    assert np.array_equal(again.labels, predictions.labels)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        Predictions.load(path)
    with pytest.raises(UserError, match="does not exist"):
        Predictions.load(tmp_path / "absent.safetensors")


class Network(nn.Module):
    """A linear classifier behind batch normalisation and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.fixture
def samples() -> TensorSamples:
    draw = np.random.default_rng(0)
    inputs = torch.from_numpy(draw.normal(2, 3, (30, 4)).astype(np.float32))
    return TensorSamples(inputs, np.arange(30) % 3)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_predict_runs_in_evaluation_mode_and_restores_each_module(samples: TensorSamples, batch_size: int) -> None:
    model = Network().train()
    model.layers[0].eval()  # a user's frozen batch normalisation stays frozen
    before = {k: v.clone() for k, v in model.state_dict().items()}
    indices = np.array([3, 29, 0, 7, 8, 11, 12, 13])
    found = predict(model, samples, indices, batch_size)
    norm, linear = model.layers[0], model.layers[2]
    expected = samples.inputs[indices] / np.sqrt(1 + norm.eps) @ linear.weight.T + linear.bias
    assert found.logits == pytest.approx(expected.detach().numpy(), rel=1e-5, abs=1e-6)
    assert found.labels.tolist() == (indices % 3).tolist()
    assert [m.training for m in model.layers] == [False, True, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_predict_restores_modes_after_a_failure(samples: TensorSamples) -> None:
    model = nn.Flatten(0).train()
    with pytest.raises(UserError, match=r"logits of shape \(5, classes\), got \(20,\)"):
        predict(model, samples, np.arange(5))
    assert model.training
    with pytest.raises(UserError, match="empty"):
        predict(model, samples, np.arange(0))
    with pytest.raises(UserError, match="did you mean 'float32'"):
        predict(model, samples, np.arange(5), precision="float23")


def test_predict_refuses_non_finite_logits(samples: TensorSamples) -> None:
    model = nn.Linear(4, 3)
    nn.init.constant_(model.weight, torch.nan)
    with pytest.raises(UserError, match="5 of 5 samples are NaN or infinite"):
        predict(model, samples, np.arange(5))


def test_predict_in_bf16_gives_float32(samples: TensorSamples) -> None:
    model = nn.Linear(4, 3)
    low, full = (predict(model, samples, np.arange(30), precision=p) for p in ("bf16", "float32"))
    assert low.logits.dtype == np.float32
    assert low.logits == pytest.approx(full.logits, abs=0.1)
    assert not np.array_equal(low.logits, full.logits)


def test_measure_has_exactly_the_documented_keys_and_the_right_sets() -> None:
    ours = outputs(0)
    values = measure(Evidence(ours, outputs(1)), QUICK)
    assert set(values) == KEYS
    assert set(values["mia"]) == set(QUICK)
    assert all(set(v) == {"mia", "attack_accuracy"} for v in values["mia"].values())
    for split in ("retain", "forget", "test"):
        predictions = getattr(ours, split)
        assert values[f"{split}_accuracy"] == 100 * (predictions.logits.argmax(1) == predictions.labels).mean()
    assert set(measure(Evidence(ours), ())["mia"]) == set()


def test_gap_is_value_minus_reference() -> None:
    evidence = Evidence(outputs(0), outputs(1))
    value, reference = measure(evidence, QUICK), measure(evidence.of_reference(), QUICK)
    assert reference["tow"] == reference["tow_signed"] == 100
    found = gap(value, reference)
    assert set(found) == KEYS
    assert found["forget_loss"] == value["forget_loss"] - reference["forget_loss"] != 0
    one = "threshold_confidence"
    assert found["mia"][one]["mia"] == value["mia"][one]["mia"] - reference["mia"][one]["mia"] != 0
    assert gap(value, None) is None


def test_without_test_set_or_reference_the_value_is_none_and_says_why() -> None:
    alone = Evidence(outputs(0, test=False))
    values = measure(alone, QUICK)
    missing = {"test_accuracy", "test_loss", "tow", "tow_signed"}
    assert {k for k, v in values.items() if v is None} == missing
    assert values["mia"] == dict.fromkeys(QUICK)
    why = reasons(alone, QUICK)
    compared = {m.name for m in METRICS.values() if m.group in GROUPS and "reference" in m.needs}
    assert set(why) == missing | set(QUICK) | compared | {"test_calibration"}
    assert why["test_loss"] == "no test set was given"
    assert why["tow"] == "there is no retrained model to compare with; no test set was given"
    assert alone.of_reference() is None
    found = gap(values, measure(Evidence(outputs(1)), QUICK))
    assert found["mia"]["svc_correctness"] is None
    assert found["test_loss"] is None
    assert found["retain_loss"] is not None


def test_evidence_refuses_a_reference_on_other_samples() -> None:
    other = Outputs(drawn(60, seed=9), *(getattr(outputs(0), s) for s in ("forget", "test")))
    with pytest.raises(UserError, match="same retain samples"):
        Evidence(outputs(0), other)
    with pytest.raises(UserError, match="same test samples"):
        Evidence(outputs(0), outputs(1, test=False))
    with pytest.raises(UserError, match="equally many classes"):
        Outputs(drawn(3, k=4), drawn(3, k=5))


def test_unknown_attack_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'svc_confidence'"):
        measure(Evidence(outputs(0)), ["svc_confidenze"])
    with pytest.raises(UserError, match="unknown attack 'retain_loss'"):
        measure(Evidence(outputs(0)), ["retain_loss"])


def test_every_metric_explains_itself() -> None:
    assert {m.name for m in METRICS.values() if m.group is None} == KEYS - GROUPS
    assert len(attacks()) == 9
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.direction in ("higher", "lower", "to_reference")
        assert all((metric.title, metric.formula, metric.ideal, metric.unit, metric.source))


def test_relabelling_the_classes_changes_nothing() -> None:
    predictions, order = drawn(50), np.random.default_rng(3).permutation(5)
    renamed = Predictions(predictions.logits[:, order], np.argsort(order)[predictions.labels])
    assert accuracy(renamed) == accuracy(predictions)
    assert mean_cross_entropy(renamed) == pytest.approx(mean_cross_entropy(predictions), rel=1e-14)
    assert np.array_equal(by_sample(correctness, renamed), by_sample(correctness, predictions))
