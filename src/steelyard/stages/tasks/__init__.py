"""How each task's rows become what a network learns from: one module a task, `prepare(config)` in each."""
