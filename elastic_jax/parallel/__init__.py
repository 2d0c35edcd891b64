"""Running on many devices and many hosts: the mesh, what is split over it, and the processes."""
