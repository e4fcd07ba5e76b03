"""The HTTP service: a client of the engine. It needs the packages of the extra `serve`."""
