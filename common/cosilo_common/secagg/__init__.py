"""Primitives of `cosilo-secagg/1`, a small module for each section of docs/protocol.md. No grpc, files or clock."""
