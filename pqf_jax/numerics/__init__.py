"""Arithmetic on arrays whose bits do not depend on order, shape or platform.

- `segments`: sums of rows by segment, the same in any order.
- `exact`: inner products that round alike in every program.
- `bf16_split`: float32 accuracy on matrix units that multiply bfloat16.
- `gathers`: rows of a table by a matrix product, for TPUs.
"""
