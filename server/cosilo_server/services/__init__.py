"""gRPC servicers: authorise the caller, translate protobuf, call the conductor. No decisions are made here."""
