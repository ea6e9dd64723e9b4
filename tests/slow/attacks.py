"""Programs that try to get out of the box, or to bring down what runs it.

Each reads from its input a JSON object with where to aim (see test_sandbox_attacks) and
prints PWNED followed by what it managed to do. Printing is all the honest ones can do too,
so an attack that only exhausts something is judged by what is left afterwards.
"""

# ruff: noqa: E501
from __future__ import annotations

_AIM = "import json, os, sys, time, socket, ctypes, threading, resource, signal\nT = json.load(sys.stdin)\n"
_TRY = """
def attempt(action):
    try:
        result = action()
    except BaseException as error:
        print("refused", type(error).__name__)
    else:
        print("PWNED", repr(result)[:200])
"""

# name: source. Every one begins with the two texts above.
PYTHON: dict[str, str] = {
    # Processes and threads.
    "fork": "attempt(os.fork)",
    "fork bomb": "for _ in range(400): attempt(os.fork)",
    "vfork by number": "attempt(lambda: 1 / (ctypes.CDLL(None).syscall(58) > 0))",
    "clone a process by number": "attempt(lambda: 1 / (ctypes.CDLL(None).syscall(56, 17, 0, 0, 0, 0) > 0))",
    "clone3 by number": "attempt(lambda: 1 / (ctypes.CDLL(None).syscall(435, bytes(64), 64) > 0))",
    "spawn": "attempt(lambda: os.posix_spawn('/bin/true', ['true'], {}))",
    "run a shell": "attempt(lambda: 1 / (os.system('true') == 0))",
    "subprocess": "import subprocess\nattempt(lambda: subprocess.run(['/bin/true'], check=True))",
    "replace itself": "attempt(lambda: os.execv('/usr/bin/env', ['env']))",
    "double fork daemon": "attempt(lambda: (os.fork() or os.setsid() or os.fork(), time.sleep(60)))",
    "new session": "attempt(os.setsid)",
    "multiprocessing": "import multiprocessing as m\nattempt(lambda: m.Process(target=print).start())",
    "thread bomb": (
        "n = 0\nthreading.stack_size(65536)\n"
        "try:\n    while n < 2000:\n        threading.Thread(target=time.sleep, args=(9,), daemon=True).start(); n += 1\n"
        "except RuntimeError: pass\nprint('PWNED' if n > 700 else 'refused', n)\nos._exit(0)"
    ),
    # Time.
    "endless loop": "while True: pass",
    "ignored signals": (
        "for s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except OSError: pass\nwhile True: pass"
    ),
    "sleep": "time.sleep(3600)",
    "hang in C": "9 ** 9 ** 9 ** 9",
    "hang in a regular expression": "import re\nre.match('(a+)+$', 'a' * 40 + 'b')",
    "exit handlers that never end": "import atexit\natexit.register(lambda: time.sleep(3600))",
    "a thread that outlives the program": "threading.Thread(target=time.sleep, args=(3600,)).start()",
    "raise the own limits": "attempt(lambda: resource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6)))",
    "another process's limits": "attempt(lambda: resource.prlimit(T['pid'], resource.RLIMIT_NOFILE))",
    # Memory and output.
    "memory": "attempt(lambda: len(bytearray(6 << 30)))",
    "memory by pieces": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "memory by memfd": "attempt(lambda: os.memfd_create('x'))",
    "memory through its own input": (
        "def flood():\n    for _ in range(10000): os.write(0, bytes(1 << 20))\n    return 'wrote'\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nattempt(flood)"
    ),
    "shared memory": "attempt(lambda: open('/dev/shm/' + T['token'], 'w'))",
    "pipes full of data": (
        "held = []\ntry:\n    while True: held.append(os.pipe())\nexcept OSError: pass\nprint('refused', len(held))"
    ),
    "output flood": "while True: sys.stdout.write('x' * 65536)",
    "error flood": "while True: sys.stderr.write('x' * 65536)",
    "recursion": "sys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1) + 1\nf(0)",
    "deep nesting": "exec('x = ' + '[' * 100000)",
    "descriptors": (
        "n = 0\ntry:\n    while n < 5000: os.dup(0); n += 1\nexcept OSError: pass\nprint('PWNED' if n > 100 else 'refused', n)"
    ),
    # Files.
    "read the secret": "attempt(lambda: open(T['secret']).read())",
    "list its folder": "attempt(lambda: os.listdir(T['folder']))",
    "passwords": "attempt(lambda: open('/etc/shadow').read())",
    "users": "attempt(lambda: open('/etc/passwd').read())",
    "the graders' source": "attempt(lambda: open(T['grader']).read())",
    "home folders": "attempt(lambda: os.listdir('/root') + os.listdir('/home'))",
    "write beside the secret": "attempt(lambda: open(T['folder'] + '/mine', 'w'))",
    "write a temporary file": "attempt(lambda: open('/tmp/' + T['token'], 'w'))",
    "write here": "attempt(lambda: open('mine', 'w'))",
    "disk flood": "for i in range(40): attempt(lambda: open(f'/tmp/{i}' + T['token'], 'wb').write(bytes(50 << 20)))",
    "inode flood": "for i in range(2000): attempt(lambda: os.mkdir(f'/tmp/{i}' + T['token']))",
    "symbolic link": "attempt(lambda: os.symlink(T['secret'], '/tmp/' + T['token']))",
    "hard link": "attempt(lambda: os.link(T['secret'], T['folder'] + '/mine'))",
    "fifo": "attempt(lambda: os.mkfifo('/tmp/' + T['token']))",
    "device": "attempt(lambda: os.mknod('/tmp/' + T['token'], 0o60666, os.makedev(8, 0)))",
    "delete the secret": "attempt(lambda: os.unlink(T['secret']))",
    "rename the secret": "attempt(lambda: os.rename(T['secret'], T['secret'] + '2'))",
    "open by handle": (
        "attempt(lambda: 1 / (ctypes.CDLL(None).syscall(304, -100, bytes([8,0,0,0,1,0,0,0,2]+[0]*7), 0) >= 0))"
    ),
    "io_uring": "attempt(lambda: 1 / (ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(120)) >= 0))",
    # Other processes.
    "kill the grader": "attempt(lambda: os.kill(T['pid'], 9))",
    "kill the grader's thread": "attempt(lambda: 1 / (ctypes.CDLL(None).syscall(234, T['pid'], T['pid'], 9) == 0))",
    "kill everyone": "attempt(lambda: os.kill(-1, 9))",
    "kill the parent": "attempt(lambda: os.kill(os.getppid(), 9))",
    "signals by file owner": "import fcntl\nattempt(lambda: fcntl.fcntl(0, fcntl.F_SETOWN, T['pid']))",
    "the grader's environment": "attempt(lambda: open(f\"/proc/{T['pid']}/environ\").read())",
    "the grader's memory": "attempt(lambda: open(f\"/proc/{T['pid']}/mem\", 'rb').read(1))",
    "the runner's memory": "attempt(lambda: open(f'/proc/{os.getppid()}/mem', 'rb').read(1))",
    "read memory by call": "attempt(lambda: 1 / (ctypes.CDLL(None).syscall(310, T['pid'], None, 0, None, 0, 0) >= 0))",
    "ptrace": "attempt(lambda: 1 / (ctypes.CDLL(None).ptrace(16, T['pid'], 0, 0) == 0))",
    "all processes": "attempt(lambda: [p for p in os.listdir('/proc') if p.isdigit()][5])",
    "outlive the parent": "attempt(lambda: 1 / (ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0))",
    "close every descriptor": "os.closerange(0, 4096)\nwhile True: time.sleep(1)",
    "talk to the runner": "for fd in range(3, 256):\n    attempt(lambda: os.write(fd, b'x' * 64))",
    # Privileges, namespaces, network.
    "become root": "attempt(lambda: os.setuid(0))",
    "be root": "print('PWNED' if os.getuid() == 0 or os.geteuid() == 0 else 'refused')",
    "a namespace of its own": "attempt(lambda: 1 / (ctypes.CDLL(None).unshare(0x10000000) == 0))",
    "mount": "attempt(lambda: 1 / (ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0))",
    "chroot": "attempt(lambda: os.chroot('/'))",
    "keys": "attempt(lambda: 1 / (ctypes.CDLL(None).syscall(250, 0, -3, 1) > 0))",
    "bpf": "attempt(lambda: 1 / (ctypes.CDLL(None).syscall(321, 0, bytes(72), 72) >= 0))",
    "host name": "attempt(lambda: socket.sethostname('mine'))",
    "clock": "attempt(lambda: time.clock_settime(time.CLOCK_REALTIME, 0))",
    "connect to a port": "attempt(lambda: socket.create_connection(('127.0.0.1', T['port']), 1))",
    "connect to an abstract socket": "attempt(lambda: socket.socket(socket.AF_UNIX).connect('\\0' + T['token']))",
    "listen": "attempt(lambda: socket.create_server(('127.0.0.1', 0)))",
    "socket pair": "attempt(socket.socketpair)",
    "the environment": "print('PWNED' if T['token'] in str(os.environ) else 'refused', sorted(os.environ))",
    "another system call table": (
        "import mmap\nm = mmap.mmap(-1, 4096, prot=7)\n"
        # int 0x80 with eax = 2: fork by the 32-bit table
        "m.write(bytes([0xb8, 2, 0, 0, 0, 0xcd, 0x80, 0xc3]))\n"
        "f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\n"
        "pid = f()\nprint('PWNED' if pid >= 0 else 'refused', pid)"
    ),
    # The grading itself.
    "unpickle": (
        "import pickle\nclass P:\n    def __reduce__(self): return os.system, ('true',)\n"
        "attempt(lambda: 1 / (pickle.loads(pickle.dumps(P())) == 0))"
    ),
    # Prints the expected output if it is anywhere in the process (written backwards here).
    "hunt for the expected output": (
        "import gc\nwanted = 'ylno taht tuptuo eht'[::-1]\n"
        "f = sys._getframe()\nwhile f:\n    found = list(f.f_locals.values()); f = f.f_back\n"
        "for o in [*gc.get_objects(), found]:\n"
        "    for v in list(o.values()) if isinstance(o, dict) else o if isinstance(o, (list, tuple)) else ():\n"
        "        if isinstance(v, (str, bytes)) and wanted in str(v) and v is not wanted: print(v)"
    ),
    "leave early": "os._exit(0)",
    "unicode and NUL": "sys.stdout.buffer.write(b'\\x00\\xff\\xfe' + '\\ud800'.encode('utf-8', 'surrogatepass'))",
}  # fmt: skip

CPP: dict[str, str] = {
    "fork": "#include <unistd.h>\n#include <cstdio>\nint main(){int p=fork();if(p>=0)puts(\"PWNED\");}",
    "fork bomb": "#include <unistd.h>\n#include <cstdio>\nint main(){for(int i=0;i<400;i++)if(fork()>=0)puts(\"PWNED\");}",
    "shell": "#include <cstdlib>\n#include <cstdio>\nint main(){if(system(\"true\")==0)puts(\"PWNED\");}",
    "exec": "#include <unistd.h>\nint main(){execl(\"/bin/sh\",\"sh\",\"-c\",\"echo PWN''ED > /tmp/x; kill -9 -1\",nullptr);}",
    "socket": "#include <sys/socket.h>\n#include <cstdio>\nint main(){if(socket(AF_INET,SOCK_STREAM,0)>=0)puts(\"PWNED\");}",
    "write": "#include <cstdio>\nint main(){if(fopen(\"/tmp/mine\",\"w\"))puts(\"PWNED\");}",
    "read": "#include <cstdio>\nint main(){if(fopen(\"/etc/passwd\",\"r\"))puts(\"PWNED\");}",
    "kill": "#include <signal.h>\n#include <cstdio>\nint main(){if(kill(-1,9)==0)puts(\"PWNED\");}",
    "ptrace": "#include <sys/ptrace.h>\n#include <unistd.h>\n#include <cstdio>\nint main(){if(ptrace(PTRACE_ATTACH,getppid(),0,0)==0)puts(\"PWNED\");}",
    "memory": "#include <vector>\n#include <cstdio>\nint main(){std::vector<char*>v;for(;;){char*p=new char[1<<24];for(int i=0;i<1<<24;i+=4096)p[i]=1;v.push_back(p);if(v.size()>200)puts(\"PWNED\");}}",
    "stack": "int f(int n){volatile char x[4096];x[0]=n;return f(n+1)+x[0];}int main(){return f(0);}",
    "loop": "int main(){volatile int x=0;for(;;)x++;}",
    "threads": "#include <pthread.h>\n#include <unistd.h>\n#include <cstdio>\nvoid*f(void*){sleep(9);return 0;}int main(){pthread_attr_t a;pthread_attr_init(&a);pthread_attr_setstacksize(&a,16384);int n=0;pthread_t t;while(n<2000&&!pthread_create(&t,&a,f,0))n++;puts(n>700?\"PWNED\":\"refused\");fflush(stdout);_exit(0);}",
    "abort": "#include <cstdlib>\nint main(){abort();}",
    "x32 system calls": "#include <unistd.h>\n#include <sys/syscall.h>\n#include <cstdio>\nint main(){if(syscall(0x40000000|57)>=0)puts(\"PWNED\");}",
    "32-bit system calls": "#include <cstdio>\nint main(){int r;asm volatile(\"int $0x80\":\"=a\"(r):\"a\"(2));if(r>=0)puts(\"PWNED\");}",
}  # fmt: skip

# These must end in a compile error, within the compiler's limits.
CPP_COMPILER: dict[str, str] = {
    "endless include": '#include "/dev/zero"\nint main(){}',
    "random include": '#include "/dev/urandom"\nint main(){}',
    "include itself": '#include __FILE__\nint main(){}',
    "include the secret": '#include "/etc/passwd"\nint main(){}',
    "deep templates": "template<int N>struct F{static const int v=F<N-1>::v+F<N-2>::v;};int main(){return F<100000>::v;}",
    "wide templates": "template<class A,class B>struct P{};template<int N>struct D{using t=P<typename D<N-1>::t,typename D<N-1>::t>;typename D<N-1>::t a[9];};template<>struct D<0>{using t=int;};D<400>::t x;int main(){return sizeof(D<400>)+nonsense;}",
    "endless constexpr": "constexpr int f(int n){int s=0;for(;;)s+=n;return s;}constexpr int x=f(1);int main(){}",
    "huge object": "char x[1ull<<40]={1};int main(){return nonsense;}",
    "macro bomb": "#define A(x) x x x x x x x x\n#define B(x) A(A(A(A(x))))\n#define C(x) B(B(B(x)))\nint main(){return 0 C(C(+1));}",
    "incbin": 'asm(".incbin \\"/dev/zero\\"");int main(){}',
    "nul and unicode": "int main(){\x00\ufffd}",
}  # fmt: skip


def python_source(name: str) -> str:
    """A whole program."""
    return attempting(PYTHON[name])


def attempting(action: str) -> str:
    """A program that begins as every attack does."""
    return _AIM + _TRY + action
