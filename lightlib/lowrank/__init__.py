"""Fewer numbers by structure: matrices of low rank, tensor decompositions, embeddings made of parts."""
