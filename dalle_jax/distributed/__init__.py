"""Devices and hosts: mesh, layouts, joining, and detection of lost hosts."""
