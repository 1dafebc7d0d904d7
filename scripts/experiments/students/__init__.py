"""Studies of students, which sample in few steps what a teacher samples in many."""
