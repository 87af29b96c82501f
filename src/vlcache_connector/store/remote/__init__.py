"""The remote tier: entries in a store that engines on several machines share, reached through an adapter of lmcache."""
