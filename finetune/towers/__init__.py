"""Vision and audio towers: the embeddings of media, computed once while the towers are frozen."""
