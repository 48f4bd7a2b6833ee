"""The commands, each a thin call of a function of `stages`, `recipes`, `report` and their like; `cli` parses them."""
