"""Workers on several GPUs or machines, by Ray: each loads models and images once, and measures its pieces.

Results do not depend on which worker made them, nor on how many there are: noise is counted, not drawn, and
each measurement is of one worker. Every measurement comes back as soon as it is made, and is on the disk of
the driving process before it counts; a worker that dies loses the one in flight, which another one makes.

Ray is loaded when it is needed, and not before: nothing is imported here.
"""
