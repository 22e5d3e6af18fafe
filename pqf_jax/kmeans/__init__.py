"""K-means on accelerators, exact and reproducible: `kmeans` and `assign`."""

from pqf_jax.kmeans.assignment import assign as assign
from pqf_jax.kmeans.kmeans import KMeansResult as KMeansResult
from pqf_jax.kmeans.kmeans import annealed_kmeans as annealed_kmeans
from pqf_jax.kmeans.kmeans import kmeans_of_layers as kmeans_of_layers
from pqf_jax.kmeans.kmeans import lloyd_kmeans as lloyd_kmeans
