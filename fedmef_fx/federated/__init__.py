"""Federated training: transport-neutral client and server cores, and an in-process engine."""
