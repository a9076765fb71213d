"""Export to a runtime, run there, measure there: one module per runtime."""

import os

# torch loads every installed device backend at import, and torch-npu without CANN makes `import torch` itself fail.
# This must run before the first import of torch; a user's own setting wins. Repeated from `compress`, because
# either package may be the first one imported.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
