"""Row formats: a decoded row to a conversation, a text or tokens."""
