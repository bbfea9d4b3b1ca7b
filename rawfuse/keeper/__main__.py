"""python -m rawfuse.keeper"""

from rawfuse.keeper import main

main()
