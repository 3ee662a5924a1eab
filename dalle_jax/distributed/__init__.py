"""Devices and hosts: the mesh, array layouts, joining several hosts, and detection of lost hosts."""
