"""`make gpu`: accuracy, races, models and tuning on an NVIDIA GPU, in stages that survive a cut."""
