"""What a run learns from: a teacher, or preferences; each gives the loop a loss, and its figures."""
