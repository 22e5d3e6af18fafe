"""The steps of k-means as each platform takes them."""
