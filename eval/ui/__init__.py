"""`fovea ui`: all artifacts under a root to look at: lists, comparisons, lineage, images, search. It writes nothing."""
