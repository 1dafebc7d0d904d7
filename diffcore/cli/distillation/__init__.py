"""Settings of a distillation, which a teacher's run or pipeline and a method complete."""
