"""How `core.discover` reads which axes a traced program ties to each other.

tracing            the apply function as one jaxpr
axis_factors       axes as products of factors, joined where they are tied
propagation        walks the program; calls and loops
axis_rules, layout_rules, contraction_rules    what each primitive ties
widening           the program rewritten to float64
permuted_network   runs it with its channels permuted
channel_check      names the groups whose permutation changes the outputs
"""
