"""Messages: checked and counted `Isend` and `Irecv`, over MPI or between virtual ranks. Nothing here knows a model."""
