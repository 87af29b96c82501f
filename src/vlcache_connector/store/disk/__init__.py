"""The disk tier: entries as files in a folder that survives a restart and that several engines may share."""
