"""`vlcache eval`: what reuse does to the answers of a model, over a file of questions, through the real engine.

`tasks` reads the questions, `settings` says how each is asked, `asking` holds the engine, `runs` asks in order and
`journal` keeps the results, `statistics` and `report` make a table and a plot of them. Only `asking` imports vLLM.
"""
