"""Plain records that cross rooms: graphs, passes, memory plans."""
