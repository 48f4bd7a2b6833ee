"""Methods, rules and optimisers as a textbook writes them: plain loops over named tensors, nothing shared, no care.

`methods` has each method's losses, `rules` each rule's gradient, `training` the loop; none of them uses the library's
objectives, rules or engine.
"""
