"""The specialists room: six domain specialists are trained, their verified answers distilled into one student, which a
mixed RL stage then finishes (arXiv 2512.02556, section 3)."""
