"""`vlcache eval`: what reuse does to the answers of a model, over a file of questions, through the real engine.
`vlcache calibrate`: how its layers should share what is recomputed, over the same kind of file.

`tasks` reads the questions, `settings` says how each is asked, `asking` holds the engine, `runs` asks in order and
`journal` keeps the results, `statistics` and `report` make a table and a plot of them. `meter` asks with ratios by
layer, `calibration` searches among these, `calibration_report` shows what it found. Only `asking` imports vLLM.
"""
