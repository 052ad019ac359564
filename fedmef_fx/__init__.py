"""Compiler-style model transformation for FedMef."""
