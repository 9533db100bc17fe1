"""A decoded row to what it says: a conversation, a text or tokens."""
