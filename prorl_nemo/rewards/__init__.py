"""Graders: a prompt's grading record and a response in, a score with its reasons out.

No torch, no Ray, no engine. `registry.grade` grades in this process, `pool.GraderPool`
in killable workers; training and evaluation use the same code.
"""
