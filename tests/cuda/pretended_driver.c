/* A CUDA driver without a GPU: for testing, on any machine, the kernels as they were compiled and all that is around them.

   numba-cuda and cuda.core load it as libcuda.so.1 and find a GPU of compute capability 9.0. Device memory is main memory in
   a range of addresses of its own, copies are made, streams, graphs and modules are kept account of; a kernel that is
   launched is looked at, and run if its program was given (pretended_gpu.c). What a real driver or GPU would answer with
   an error, or, worse, with wrong numbers, is counted as trouble and put on standard error: memory that was freed or never
   given, in a copy or among a kernel's arguments, when it is launched and again whenever a graph with it is; work on the
   default stream; waiting or copying from the host while a graph is recorded; grids and blocks beyond the limits.

   Functions that are not here answer "not supported". Only what the tests ask of it is exported under pretended_*. */
#define _GNU_SOURCE
#include "pretended_driver.h"
#include <cuda.h>
#include <dlfcn.h>
#include <elf.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define ROOM ((size_t)1 << 40) /* of addresses, which are never used twice: so a pointer to freed memory is found out */
#define PAGE 4096
#define MOST 1000000 /* allocations */
#define SHOWN 50     /* troubles that are put on standard error; all are counted */
#define CONTEXT ((CUcontext)0x11)

/* What pretended_counts gives, in this order. */
static struct { atomic_long launches, to_device, to_host, on_device, graph_launches, graph_kernels, held, trouble; } counts;
static size_t capacity = (size_t)16 << 30;
static int break_captures, programs;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void pretended_counts(long *out) { memcpy(out, &counts, sizeof counts); }
void pretended_capacity(size_t bytes) { capacity = bytes; }
void pretended_forget_trouble(void) { counts.trouble = 0; }
void pretended_broken_captures(int broken) { break_captures = broken; }
void pretended_programs(void) { programs = 1; }

void trouble(const char *format, ...)
{
    va_list given;
    if (counts.trouble++ >= SHOWN) return;
    va_start(given, format);
    fputs("pretended driver: ", stderr);
    vfprintf(stderr, format, given);
    fputc('\n', stderr);
    va_end(given);
}

/* ------------------------------------------------------------------------------------------------------- memory */

typedef struct { char *start; size_t bytes; int live; } Piece;
static Piece pieces[MOST];
static int number;
static char *room;
static int *owner; /* of each page of the room: which piece begins or goes on there */
static size_t used;

static int is_device(const void *address) { return room && (char *)address >= room && (char *)address < room + used; }

/* The piece that an address on the device lies in, or just behind. */
static Piece *piece_of(const char *address) { return &pieces[owner[(address - room) / PAGE]]; }

/* Asked for every access of a kernel, so without the lock: what a kernel may use was given before it began. */
int is_given(const char *address, size_t bytes)
{
    Piece *piece = is_device(address) ? piece_of(address) : NULL;
    return piece && piece->live && address + bytes <= piece->start + piece->bytes;
}

CUresult cuMemAlloc(CUdeviceptr *out, size_t bytes)
{
    size_t taken = (bytes + PAGE - 1) / PAGE * PAGE;
    pthread_mutex_lock(&lock);
    CUresult result = !bytes ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
    if (counts.held + bytes > capacity || number == MOST || used + taken > ROOM) result = CUDA_ERROR_OUT_OF_MEMORY;
    if (!result) {
        char *start = room + used;
        mprotect(start, taken, PROT_READ | PROT_WRITE);
        if (programs) memset(start, 0xff, bytes); /* what nobody wrote is no number */
        for (size_t page = 0; page < taken / PAGE; page++) owner[used / PAGE + page] = number;
        pieces[number++] = (Piece){start, bytes, 1};
        used += taken;
        counts.held += bytes;
        *out = (CUdeviceptr)start;
    }
    pthread_mutex_unlock(&lock);
    return result;
}

CUresult cuMemFree(CUdeviceptr address)
{
    pthread_mutex_lock(&lock);
    Piece *piece = is_device((void *)address) ? piece_of((char *)address) : NULL;
    if (!piece || !piece->live || piece->start != (char *)address) {
        trouble("%llx is freed and was not given", address);
    } else {
        piece->live = 0;
        counts.held -= piece->bytes;
        madvise(piece->start, piece->bytes, MADV_DONTNEED);
        mprotect(piece->start, piece->bytes, PROT_NONE);
    }
    pthread_mutex_unlock(&lock);
    return CUDA_SUCCESS;
}

CUresult cuMemGetInfo(size_t *free, size_t *total)
{
    *free = capacity - counts.held;
    *total = capacity;
    return CUDA_SUCCESS;
}

/* -------------------------------------------------------------------------------------------- device and context */

CUresult cuInit(unsigned flags)
{
    int kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    if (!room) room = mmap(NULL, ROOM, PROT_NONE, kind, -1, 0);
    if (!owner) owner = mmap(NULL, ROOM / PAGE * sizeof *owner, PROT_READ | PROT_WRITE, kind, -1, 0);
    return room == MAP_FAILED || owner == MAP_FAILED ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return CUDA_SUCCESS; }
CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice device) { memset(uuid, 7, sizeof *uuid); return CUDA_SUCCESS; }

CUresult cuDeviceGetName(char *name, int size, CUdevice device)
{
    snprintf(name, size, "Pretended GPU");
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device)
{
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 48 << 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 1 << 16; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1;
    }
    return CUDA_SUCCESS;
}

static __thread CUcontext stack[64];
static __thread int depth;

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = CONTEXT; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRelease(CUdevice device) { return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = depth ? stack[depth - 1] : NULL; return CUDA_SUCCESS; }

CUresult cuCtxPushCurrent(CUcontext context)
{
    if (depth == 64) return CUDA_ERROR_INVALID_CONTEXT;
    stack[depth++] = context;
    return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent(CUcontext *context)
{
    if (!depth) return CUDA_ERROR_INVALID_CONTEXT;
    *context = stack[--depth];
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context)
{
    if (depth) stack[depth - 1] = context; else stack[depth++] = context;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device)
{
    *device = 0;
    return depth ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

/* ----------------------------------------------------------------------------------- modules: what a kernel takes */

typedef struct {
    char name[512];
    int count;
    struct { unsigned offset, bytes; } parameters[256];
    Program *program; /* what it does, if that was said */
    size_t registers; /* bytes of a thread */
    uint32_t shared;  /* bytes of a block */
} Kernel;

void pretended_program(Kernel *kernel, Program *program, size_t registers, uint32_t shared)
{
    kernel->program = program;
    kernel->registers = registers;
    kernel->shared = shared;
}

static const Elf64_Shdr *sections(const char *image) { return (void *)(image + ((Elf64_Ehdr *)image)->e_shoff); }

CUresult cuLibraryLoadData(CUlibrary *library, const void *code, CUjit_option *a, void **b, unsigned c,
                           CUlibraryOption *d, void **e, unsigned f)
{
    const Elf64_Ehdr *head = code;
    if (memcmp(code, ELFMAG, SELFMAG)) return CUDA_ERROR_INVALID_IMAGE;
    size_t bytes = head->e_shoff + head->e_shnum * sizeof(Elf64_Shdr);
    for (int i = 0; i < head->e_shnum; i++) {
        const Elf64_Shdr *section = sections(code) + i;
        size_t end = section->sh_offset + section->sh_size;
        if (section->sh_type != SHT_NOBITS && end > bytes) bytes = end;
    }
    *library = memcpy(malloc(bytes), code, bytes);
    return CUDA_SUCCESS;
}

/* The section .nv.info.NAME of machine code says of each parameter, under attribute 0x17, where it lies and how long it is. */
CUresult cuLibraryGetKernel(CUkernel *out, CUlibrary library, const char *name)
{
    const char *image = (char *)library;
    const Elf64_Ehdr *head = (void *)image;
    const char *names = image + sections(image)[head->e_shstrndx].sh_offset;
    Kernel *kernel = calloc(1, sizeof *kernel);
    char wanted[600];
    snprintf(kernel->name, sizeof kernel->name, "%s", name);
    snprintf(wanted, sizeof wanted, ".nv.info.%s", name);
    for (int i = 0; i < head->e_shnum; i++) {
        const Elf64_Shdr *section = sections(image) + i;
        if (strcmp(names + section->sh_name, wanted)) continue;
        const uint8_t *at = (void *)(image + section->sh_offset), *end = at + section->sh_size;
        while (at < end) {
            uint16_t size, place[2];
            uint32_t packed;
            memcpy(&size, at + 2, sizeof size);
            if (at[0] == 4 && at[1] == 0x17) {
                memcpy(place, at + 8, sizeof place);
                memcpy(&packed, at + 12, sizeof packed);
                kernel->parameters[place[0]].offset = place[1];
                kernel->parameters[place[0]].bytes = packed >> 18;
                if (place[0] >= kernel->count) kernel->count = place[0] + 1;
            }
            at += at[0] == 4 ? 4 + size : 4;
        }
        *out = (CUkernel)kernel;
        return CUDA_SUCCESS;
    }
    free(kernel);
    return CUDA_ERROR_NOT_FOUND;
}

CUresult cuLibraryUnload(CUlibrary library) { return CUDA_SUCCESS; }

CUresult cuKernelGetAttribute(int *value, CUfunction_attribute attribute, CUkernel kernel, CUdevice device)
{
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

/* ------------------------------------------------------------------------------ streams, graphs, copies, launches */

typedef struct Launch { Kernel *kernel; struct Launch *next; unsigned grid[3], block[3]; uint64_t values[]; } Launch;
typedef struct { Launch *first, **last; long count; } Graph;
typedef struct { Graph *recorded; } Stream;

static int is_recorded(CUstream stream) { return (uintptr_t)stream > 16 && ((Stream *)stream)->recorded; }

static void expect(CUstream stream, const char *what, int may_be_recorded)
{
    if ((uintptr_t)stream <= 16) trouble("%s on the default stream", what);
    if (!may_be_recorded && is_recorded(stream)) trouble("%s while a graph is recorded", what);
}

CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest)
{
    *least = *greatest = 0;
    return CUDA_SUCCESS;
}

CUresult cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int priority)
{
    if (flags != CU_STREAM_NON_BLOCKING) trouble("a stream that waits for the default one");
    *stream = calloc(1, sizeof(Stream));
    return CUDA_SUCCESS;
}

CUresult cuStreamDestroy(CUstream stream) { free(stream); return CUDA_SUCCESS; }
CUresult cuStreamSynchronize(CUstream stream) { expect(stream, "waiting", 0); return CUDA_SUCCESS; }

CUresult cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode mode)
{
    Graph *graph = calloc(1, sizeof *graph);
    graph->last = &graph->first;
    ((Stream *)stream)->recorded = graph;
    return CUDA_SUCCESS;
}

CUresult cuStreamEndCapture(CUstream stream, CUgraph *graph)
{
    *graph = break_captures ? NULL : (CUgraph)((Stream *)stream)->recorded;
    ((Stream *)stream)->recorded = NULL;
    return break_captures ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_SUCCESS;
}

CUresult cuStreamGetCaptureInfo(CUstream stream, CUstreamCaptureStatus *status, cuuint64_t *id, CUgraph *graph,
                                const CUgraphNode **nodes, const CUgraphEdgeData **edges, size_t *count)
{
    *status = is_recorded(stream) ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
    if (id) *id = 1;
    if (graph) *graph = is_recorded(stream) ? (CUgraph)((Stream *)stream)->recorded : NULL;
    if (count) *count = 0;
    return CUDA_SUCCESS;
}

CUresult cuGraphInstantiateWithParams(CUgraphExec *out, CUgraph graph, CUDA_GRAPH_INSTANTIATE_PARAMS *parameters)
{
    parameters->result_out = CUDA_GRAPH_INSTANTIATE_SUCCESS;
    *out = (CUgraphExec)graph;
    return CUDA_SUCCESS;
}

CUresult cuGraphDestroy(CUgraph graph) { return CUDA_SUCCESS; }
CUresult cuGraphExecDestroy(CUgraphExec graph) { return CUDA_SUCCESS; }
CUresult cuGraphRetainUserObject(CUgraph graph, CUuserObject object, unsigned n, unsigned f) { return CUDA_SUCCESS; }
CUresult cuGraphReleaseUserObject(CUgraph graph, CUuserObject object, unsigned n) { return CUDA_SUCCESS; }

CUresult cuUserObjectCreate(CUuserObject *out, void *object, CUhostFn destroy, unsigned count, unsigned flags)
{
    *out = (CUuserObject)object;
    return CUDA_SUCCESS;
}

CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t bytes, CUstream stream)
{
    expect(stream, "a copy from the host", 0);
    counts.to_device++;
    if (is_given((char *)to, bytes)) memcpy((void *)to, from, bytes);
    else trouble("a copy of %zu bytes to %llx, which was not given", bytes, to);
    return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t bytes, CUstream stream)
{
    expect(stream, "a copy to the host", 0);
    counts.to_host++;
    if (is_given((char *)from, bytes)) memcpy(to, (void *)from, bytes);
    else trouble("a copy of %zu bytes from %llx, which was not given", bytes, from);
    return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream)
{
    expect(stream, "a copy on the device", 1);
    counts.on_device++;
    if (!is_given((char *)from, bytes)) trouble("a copy of %zu bytes from %llx, which was not given", bytes, from);
    else if (!is_given((char *)to, bytes)) trouble("a copy of %zu bytes to %llx, which was not given", bytes, to);
    else memcpy((void *)to, (void *)from, bytes);
    return CUDA_SUCCESS;
}

/* An argument of eight bytes that is an address in the device's range has to be one that was given and not freed. */
static void look_at(const Launch *launch, const char *when)
{
    for (int i = 0; i < launch->kernel->count; i++)
        if (launch->kernel->parameters[i].bytes == 8 && is_device((void *)launch->values[i]) &&
            !is_given((char *)launch->values[i], 1))
            trouble("%s, argument %d of %s points to freed memory", when, i, launch->kernel->name);
}

static void run(const Launch *launch, const char *when)
{
    const Kernel *kernel = launch->kernel;
    look_at(launch, when);
    if (kernel->program)
        run_grid(kernel->program, kernel->registers, kernel->shared, launch->grid, launch->block, launch->values, kernel->name);
    else if (programs)
        trouble("%s has no program", kernel->name);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **given, void **extra)
{
    Kernel *kernel = (Kernel *)function;
    unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
    if (!config->gridDimX || !config->gridDimY || !config->gridDimZ || config->gridDimX > INT32_MAX ||
        config->gridDimY > UINT16_MAX || config->gridDimZ > UINT16_MAX || !threads || threads > 1024 ||
        config->blockDimZ > 64 || config->sharedMemBytes > 48 << 10) {
        trouble("%s cannot be launched with %u × %u × %u blocks of %u threads and %u bytes", kernel->name, config->gridDimX,
                config->gridDimY, config->gridDimZ, threads, config->sharedMemBytes);
        return CUDA_ERROR_INVALID_VALUE;
    }
    expect(config->hStream, "a kernel", 1);
    Launch *launch = calloc(1, sizeof *launch + kernel->count * sizeof(uint64_t));
    *launch = (Launch){kernel, NULL, {config->gridDimX, config->gridDimY, config->gridDimZ},
                       {config->blockDimX, config->blockDimY, config->blockDimZ}};
    for (int i = 0; i < kernel->count; i++)
        memcpy(&launch->values[i], given[i], kernel->parameters[i].bytes < 8 ? kernel->parameters[i].bytes : 8);
    counts.launches++;
    if (is_recorded(config->hStream)) {
        look_at(launch, "when it is recorded");
        Graph *graph = ((Stream *)config->hStream)->recorded;
        *graph->last = launch;
        graph->last = &launch->next;
        graph->count++;
    } else {
        run(launch, "at its launch");
        free(launch);
    }
    return CUDA_SUCCESS;
}

CUresult cuGraphLaunch(CUgraphExec graph, CUstream stream)
{
    expect(stream, "a graph", 0);
    for (Launch *launch = ((Graph *)graph)->first; launch; launch = launch->next) run(launch, "in a graph");
    counts.graph_launches++;
    counts.graph_kernels += ((Graph *)graph)->count;
    return CUDA_SUCCESS;
}

/* ------------------------------------------------------------------------------------------------- finding these */

CUresult cuGetErrorName(CUresult error, const char **name)
{
    *name = error == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR";
    return CUDA_SUCCESS;
}

static CUresult not_supported(void) { return CUDA_ERROR_NOT_SUPPORTED; }

/* cuda.h gives a function's newest form its plain name; the symbol is then called NAME_v2 or so. */
CUresult cuGetProcAddress(const char *name, void **out, int version, cuuint64_t flags, CUdriverProcAddressQueryResult *status)
{
    void *self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    char symbol[256];
    *out = dlsym(self, name);
    for (int form = 4; form > 1 && !*out; form--) {
        snprintf(symbol, sizeof symbol, "%s_v%d", name, form);
        *out = dlsym(self, symbol);
    }
    if (!*out) *out = (void *)not_supported;
    if (status) *status = CU_GET_PROC_ADDRESS_SUCCESS;
    return CUDA_SUCCESS;
}
