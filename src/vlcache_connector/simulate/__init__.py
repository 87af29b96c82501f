"""`vlcache simulate`: a recorded trace against eviction policies, capacities, and what no policy could exceed."""
