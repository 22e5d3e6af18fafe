"""K-means on accelerators, exact and reproducible: two doors.

- k-means: `annealed_kmeans`, `lloyd_kmeans` and, for several layers at once,
  `kmeans_of_layers` and `kmeans_on_each_device`; each result is a
  `KMeansResult`.
- `assign`: the nearest centroid of every sub-vector.

The modules, in the order of reading:

- `reference`: the whole algorithm in plain NumPy.
- `kmeans`: the formulas, and the first door.
- `annealing`: noise and momentum of every step, and which rule assigns.
- `loop`: one step, and the loop over all of them.
- `assignment`: nearest centroids, and the second door.
- `hartigan`: the rule that assigns where clusters are small.
- `empty_clusters`: the rule for centroids of clusters without sub-vectors.
- `outliers`: sub-vectors far from all others, with codewords of their own.
- `batching`: several layers in one set of tiles.
- `devices`: one program for devices that have layers of their own.
- `backends`: kernels and sums of each platform.
"""

from pqf_jax.kmeans.assignment import assign as assign
from pqf_jax.kmeans.kmeans import KMeansResult as KMeansResult
from pqf_jax.kmeans.kmeans import annealed_kmeans as annealed_kmeans
from pqf_jax.kmeans.kmeans import kmeans_of_layers as kmeans_of_layers
from pqf_jax.kmeans.kmeans import kmeans_on_each_device as kmeans_on_each_device
from pqf_jax.kmeans.kmeans import lloyd_kmeans as lloyd_kmeans
