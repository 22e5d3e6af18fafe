"""Discovery of kernels and tied channel axes, from a network's own program.

discover       names the groups of tied axes of a tree's variables
kernels        finds the kernels, and what their axes are for
probes         show where a layer reads a kernel
readers        checks that layers can read compressed kernels
tracing        traces the apply function into one program (jaxpr)
propagation    walks the program equation by equation
loops          finds the groups that each layer of a scan may order alone
rules          states which axes each primitive ties, and which it blocks
axis_factors   holds axes as sums and products of factors, which may be tied
self_check     permutes the groups at random and compares the outputs
widening       runs the program in float64
samples        checks the inputs that a program is run with
masks          tells what of padded inputs counts
small_maps     finds convolutions that a CPU needs other compiler options for
"""
