"""Discovery of the tied channel axes of a network, from its own program.

discover       names the groups of tied axes of a tree's variables
tracing        traces the apply function into one program (jaxpr)
propagation    walks the program equation by equation
rules          states which axes each primitive ties, and which it blocks
axis_factors   holds axes as products of factors, joined where they are tied
self_check     permutes the groups at random and compares the outputs
widening       runs the program in float64
"""
