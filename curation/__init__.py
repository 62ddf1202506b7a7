"""What is computed on rows and vectors: duplicates, clusters, retrieval, balance, manifests, audit."""
