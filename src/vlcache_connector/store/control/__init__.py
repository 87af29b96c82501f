"""How a running cache is looked into: a unix socket of the scheduler process, and the commands behind it. No torch.

protocol   what goes over the socket, and what a cache can be asked (`CacheCommands`)
folder     where sockets lie, and who may be trusted there
server     the scheduler process: answers while the engine runs
client     the command line: finds caches and asks them
"""
