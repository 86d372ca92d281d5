import sys
from . import static
sys.exit(static.main(sys.argv[2:]))
