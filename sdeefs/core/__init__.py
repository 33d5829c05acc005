"""The union filesystem itself: layers, nodes, copy-up, handles. Synchronous, without FUSE."""
