/* A stand-in for libnvidia-ml.so.1: NVML's ABI over a control file, so that the real pynvml makes
 * its real calls on a machine without a GPU.
 *
 * The file that NVML_STANDIN names holds lines "KEY VALUE", read again when the file was replaced:
 *   devices N                how many GPUs there are (1, or what NVML_STANDIN_DEVICES says)
 *   epoch N                  the driver was started N times: what was opened before is dead
 *   error.FUNCTION CODE      FUNCTION returns CODE; error.INDEX.FUNCTION for one device only
 *   error.field.ID CODE      field ID of GetFieldValues answers with CODE
 *   hang.FUNCTION 1          FUNCTION does not return while the line is there
 *   energy.INDEX MILLIJOULES the counter; without it, it rises with 300 W
 *   field.ID VALUE           a field's value; pcie_bits 32 makes the PCIe counters narrow ones
 *   process.INDEX.PID BYTES  a process on a GPU (of a MIG instance: process.INDEX.mig.PID)
 *   mig.INDEX N              MIG is on, with N instances in places 0, 2, 4, …
 *   xid.INDEX CODE, xids N   the GPU writes CODE; N Xid errors were written so far
 *   gpm 0                    no GPM
 *   reasons BITS, power MILLIWATTS
 * NVML_STANDIN_NAME is what all of them are called, if not by their numbers.
 * Compiled with -DOLD_DRIVER, the functions that newer drivers brought are not there.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { GPUS = 16, INSTANCES = 7, LINES = 128 };
enum {
    SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7, TIMED_OUT = 10, GPU_IS_LOST = 15, VERSION_MISMATCH = 25
};

typedef unsigned long long u64;
typedef int nvmlReturn_t;
typedef struct device { unsigned index, instance; int is_mig; u64 epoch; } *nvmlDevice_t;

static struct device devices[GPUS], instances[GPUS][INSTANCES];
static int initialised;
static u64 xids_taken;
static struct { char name[64]; unsigned calls; } counted[64];

/* How often a function was called since the library was loaded. */
unsigned standin_calls(const char *name) {
    for (int i = 0; i < 64; i++)
        if (!strcmp(counted[i].name, name)) return counted[i].calls;
    return 0;
}

static void count(const char *name) {
    for (int i = 0; i < 64; i++) {
        if (!counted[i].name[0]) snprintf(counted[i].name, sizeof counted[i].name, "%s", name);
        if (!strcmp(counted[i].name, name)) { counted[i].calls++; return; }
    }
}

static struct { char key[96]; u64 value; } lines[LINES];
static int n_lines;

static void load(void) {
    static struct stat seen;
    struct stat now;
    const char *path = getenv("NVML_STANDIN");
    char line[160];
    if (!path || !*path || stat(path, &now)) { n_lines = 0; return; }
    if (now.st_ino == seen.st_ino && now.st_mtim.tv_sec == seen.st_mtim.tv_sec
        && now.st_mtim.tv_nsec == seen.st_mtim.tv_nsec) return;
    FILE *file = fopen(path, "r");
    if (!file) { n_lines = 0; return; }
    seen = now;
    n_lines = 0;
    while (n_lines < LINES && fgets(line, sizeof line, file))
        if (sscanf(line, "%95s %llu", lines[n_lines].key, &lines[n_lines].value) == 2) n_lines++;
    fclose(file);
}

static int control(const char *key, u64 *value) {
    int yes = 0;
    load();
    for (int i = 0; i < n_lines; i++)
        if (!strcmp(lines[i].key, key)) { *value = lines[i].value; yes = 1; }
    return yes;
}

static u64 setting(const char *key, u64 otherwise) {
    u64 value = otherwise;
    control(key, &value);
    return value;
}

static u64 setting_of(const char *prefix, unsigned number, u64 otherwise) {
    char key[64];
    snprintf(key, sizeof key, "%s.%u", prefix, number);
    return setting(key, otherwise);
}

static unsigned gpus(void) {
    const char *many = getenv("NVML_STANDIN_DEVICES");
    return (unsigned)setting("devices", many && *many ? strtoull(many, NULL, 10) : 1);
}

static nvmlReturn_t enter(const char *function, nvmlDevice_t device) {
    char key[128];
    count(function);
    snprintf(key, sizeof key, "hang.%s", function);
    while (setting(key, 0)) usleep(5000);
    snprintf(key, sizeof key, "error.%s", function);
    nvmlReturn_t code = (nvmlReturn_t)setting(key, SUCCESS);
    if (code == SUCCESS && device) {
        snprintf(key, sizeof key, "error.%u.%s", device->index, function);
        code = (nvmlReturn_t)setting(key, SUCCESS);
        if (code == SUCCESS && (device->epoch != setting("epoch", 0) || device->index >= gpus()))
            code = GPU_IS_LOST;
    }
    if (code == SUCCESS && !initialised && strcmp(function, "nvmlInitWithFlags"))
        code = UNINITIALIZED;
    return code;
}

#define ENTER(device) \
    do { nvmlReturn_t code = enter(__func__, device); if (code != SUCCESS) return code; } while (0)
/* What a MIG instance does not answer, because it belongs to the whole GPU. */
#define OF_WHOLE_GPU(device) do { if (device->is_mig) return NOT_SUPPORTED; } while (0)

nvmlReturn_t nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    ENTER(NULL);
    initialised = 1;
    return SUCCESS;
}

nvmlReturn_t nvmlShutdown(void) {
    ENTER(NULL);
    initialised = 0;
    return SUCCESS;
}

const char *nvmlErrorString(nvmlReturn_t code) {
    static char text[32];
    snprintf(text, sizeof text, "stand-in error %d", code);
    return text;
}

/* ------------------------------------------------------------------------------------- devices */

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned *n) {
    ENTER(NULL);
    *n = gpus();
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *device) {
    if (index >= GPUS) return INVALID_ARGUMENT;
    devices[index] = (struct device){.index = index, .epoch = setting("epoch", 0)};
    ENTER(&devices[index]);
    *device = &devices[index];
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned length) {
    const char *named = getenv("NVML_STANDIN_NAME");
    ENTER(device);
    if (named && *named) snprintf(name, length, "%s", named);
    else snprintf(name, length, setting("unified", 0) ? "NVIDIA GB10" : "Stand-in GPU %u",
                  device->index);
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned length) {
    ENTER(device);
    snprintf(uuid, length, "%s-00000000-0000-0000-0000-000000000%x0%x",
             device->is_mig ? "MIG" : "GPU", device->instance, device->index);
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t device, u64 *mj) {
    struct timespec now;
    char key[32];
    ENTER(device);
    OF_WHOLE_GPU(device);
    clock_gettime(CLOCK_MONOTONIC, &now);
    snprintf(key, sizeof key, "energy.%u", device->index);
    if (!control(key, mj)) *mj = 300000ULL * (u64)now.tv_sec + 300ULL * (u64)now.tv_nsec / 1000000;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t device, unsigned *milliwatts) {
    ENTER(device);
    OF_WHOLE_GPU(device);
    *milliwatts = (unsigned)setting("power", 250000);
    return SUCCESS;
}

typedef struct { u64 total, free, used; } memory_v1;
typedef struct { unsigned version; u64 total, reserved, free, used; } memory_v2;

nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, memory_v1 *memory) {
    ENTER(device);
    memory->total = 80ULL << 30;
    memory->used = 61ULL << 30; /* the reserved 1 GiB counted in, as the old call does */
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

typedef struct { unsigned gpu, memory; } utilization;

nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t device, utilization *rates) {
    ENTER(device);
    OF_WHOLE_GPU(device);
    if (setting_of("mig", device->index, 0)) return NOT_SUPPORTED;
    rates->gpu = 87;
    rates->memory = 40;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t device, int sensor, unsigned *celsius) {
    (void)sensor;
    ENTER(device);
    *celsius = 64;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetClockInfo(nvmlDevice_t device, int type, unsigned *megahertz) {
    ENTER(device);
    *megahertz = type == 1 ? 1980 : 2619; /* SM, memory */
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetCurrentClocksThrottleReasons(nvmlDevice_t device, u64 *reasons) {
    ENTER(device);
    *reasons = setting("reasons", 0);
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetPcieThroughput(nvmlDevice_t device, int counter, unsigned *kilobytes) {
    ENTER(device);
    *kilobytes = counter == 0 ? 1500 : 2500; /* sent, received */
    return SUCCESS;
}

/* ---------------------------------------------------------------------------------- processes */

typedef struct { unsigned pid; u64 used; unsigned gpu_instance, compute_instance; } process;

nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v2(nvmlDevice_t device, unsigned *n,
                                                     process *found) {
    char prefix[48];
    unsigned space = found ? *n : 0;
    ENTER(device);
    snprintf(prefix, sizeof prefix, device->is_mig ? "process.%u.mig." : "process.%u.",
             device->index);
    load();
    *n = 0;
    for (int i = 0; i < n_lines; i++) {
        const char *pid = lines[i].key + strlen(prefix);
        if (strncmp(lines[i].key, prefix, strlen(prefix)) || *pid < '0' || *pid > '9') continue;
        if (*n < space)
            found[*n] = (process){(unsigned)strtoul(pid, NULL, 10), lines[i].value, ~0U, ~0U};
        ++*n;
    }
    return *n > space ? INSUFFICIENT_SIZE : SUCCESS;
}

/* ------------------------------------------------------------------------------------- fields */

typedef union { double d; unsigned ui; u64 ull; } value;
typedef struct {
    unsigned field, scope;
    long long timestamp, latency;
    int type;
    nvmlReturn_t code;
    value value;
} field_value;
enum { UNSIGNED_INT = 1, UNSIGNED_LONG_LONG = 3 };

nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t device, int n, field_value *fields) {
    struct timespec now;
    ENTER(device);
    clock_gettime(CLOCK_MONOTONIC, &now);
    u64 ms = 1000ULL * (u64)now.tv_sec + (u64)now.tv_nsec / 1000000;
    for (int i = 0; i < n; i++) {
        field_value *one = &fields[i];
        one->code = (nvmlReturn_t)setting_of("error.field", one->field, SUCCESS);
        one->type = UNSIGNED_LONG_LONG;
        switch (one->field) {
        case 3: one->value.ull = 2; break;                  /* ECC, corrected */
        case 4: one->value.ull = 0; break;                  /* … not corrected */
        case 74: one->value.ull = 1500000000ULL; break;     /* ns held down by power */
        case 75: one->value.ull = 250000000ULL; break;      /* … by heat */
        case 94: one->type = UNSIGNED_INT; one->value.ui = 7; break; /* PCIe replays */
        case 197: one->value.ull = 3000000ULL * ms; break;  /* bytes sent: 3 GB/s */
        case 198: one->value.ull = 5000000ULL * ms; break;  /* bytes received: 5 GB/s */
        default: if (one->code == SUCCESS) one->code = NOT_SUPPORTED;
        }
        if (one->field >= 197 && setting("pcie_bits", 64) == 32) {
            one->type = UNSIGNED_INT;
            one->value.ui = (unsigned)one->value.ull;
        }
        char key[32];
        snprintf(key, sizeof key, "field.%u", one->field);
        u64 given;
        if (control(key, &given)) { one->value.ull = given; one->code = SUCCESS; }
    }
    return SUCCESS;
}

/* ---------------------------------------------------------------------------------- Xid errors */

typedef struct event_set { int registered[GPUS]; } *event_set;
typedef struct {
    nvmlDevice_t device;
    u64 type, data;
    unsigned gpu_instance, compute_instance;
} event_data;

nvmlReturn_t nvmlEventSetCreate(event_set *set) {
    ENTER(NULL);
    *set = calloc(1, sizeof **set);
    xids_taken = setting("xids", 0);
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceRegisterEvents(nvmlDevice_t device, u64 types, event_set set) {
    ENTER(device);
    set->registered[device->index] = types == 8;
    return SUCCESS;
}

nvmlReturn_t nvmlEventSetWait_v2(event_set set, event_data *event, unsigned timeout_ms) {
    (void)timeout_ms;
    ENTER(NULL);
    if (xids_taken >= setting("xids", 0)) return TIMED_OUT;
    xids_taken++;
    for (unsigned i = 0; i < GPUS; i++) {
        u64 code = setting_of("xid", i, 0);
        if (!code || !set->registered[i]) continue;
        *event = (event_data){.device = &devices[i], .type = 8, .data = code};
        return SUCCESS;
    }
    return TIMED_OUT;
}

nvmlReturn_t nvmlEventSetFree(event_set set) {
    ENTER(NULL);
    free(set);
    return SUCCESS;
}

/* ----------------------------------------------------------------------------------------- MIG */

nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned *now, unsigned *pending) {
    ENTER(device);
    *now = *pending = setting_of("mig", device->index, 0) > 0;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMaxMigDeviceCount(nvmlDevice_t device, unsigned *n) {
    ENTER(device);
    *n = INSTANCES;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice_t device, unsigned place,
                                                 nvmlDevice_t *instance) {
    ENTER(device);
    if (place % 2 || place / 2 >= setting_of("mig", device->index, 0)) return NOT_FOUND;
    *instance = &instances[device->index][place];
    **instance = (struct device){device->index, place, 1, device->epoch};
    return SUCCESS;
}

/* ----------------------------------------------------------------------------------------- GPM */

typedef struct gpm_sample { struct timespec at; int taken; } *gpm_sample;
typedef struct { unsigned version, supported; } gpm_support;
typedef struct { unsigned id; nvmlReturn_t code; double value; const char *names[3]; } gpm_metric;
typedef struct {
    unsigned version, n;
    gpm_sample before, after;
    gpm_metric metrics[];
} gpm_get;

nvmlReturn_t nvmlGpmQueryDeviceSupport(nvmlDevice_t device, gpm_support *support) {
    ENTER(device);
    support->supported = (unsigned)setting("gpm", 1);
    return SUCCESS;
}

nvmlReturn_t nvmlGpmSampleAlloc(gpm_sample *sample) {
    ENTER(NULL);
    *sample = calloc(1, sizeof **sample);
    return SUCCESS;
}

nvmlReturn_t nvmlGpmSampleFree(gpm_sample sample) {
    ENTER(NULL);
    free(sample);
    return SUCCESS;
}

nvmlReturn_t nvmlGpmSampleGet(nvmlDevice_t device, gpm_sample sample) {
    ENTER(device);
    clock_gettime(CLOCK_MONOTONIC, &sample->at);
    sample->taken = 1;
    return SUCCESS;
}

nvmlReturn_t nvmlGpmMetricsGet(gpm_get *get) {
    ENTER(NULL);
    if (get->version != 1) return VERSION_MISMATCH;
    if (!get->before->taken || !get->after->taken) return INVALID_ARGUMENT;
    double span = (double)(get->after->at.tv_sec - get->before->at.tv_sec)
                + (double)(get->after->at.tv_nsec - get->before->at.tv_nsec) / 1e9;
    if (span <= 0) return INVALID_ARGUMENT;
    for (unsigned i = 0; i < get->n; i++) {
        get->metrics[i].code = SUCCESS;
        switch (get->metrics[i].id) {
        case 3: get->metrics[i].value = 45; break;  /* SM occupancy */
        case 5: get->metrics[i].value = 12.5; break; /* any tensor */
        case 10: get->metrics[i].value = 81; break; /* DRAM bandwidth */
        default: get->metrics[i].code = NOT_SUPPORTED;
        }
    }
    return SUCCESS;
}

/* ------------------------------------------------------------------------- what came later */

#ifndef OLD_DRIVER
typedef struct { unsigned version; int sensor; int celsius; } temperature_v1;

nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, memory_v2 *memory) {
    ENTER(device);
    if (memory->version != (sizeof *memory | 2U << 24)) return VERSION_MISMATCH;
    memory->total = device->is_mig ? 20ULL << 30 : 80ULL << 30;
    memory->reserved = device->is_mig ? 0 : 1ULL << 30;
    memory->used = device->is_mig ? (u64)(3 + device->instance) << 30 : 60ULL << 30;
    memory->free = memory->total - memory->used - memory->reserved;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetTemperatureV(nvmlDevice_t device, temperature_v1 *temperature) {
    ENTER(device);
    temperature->celsius = 65;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetCurrentClocksEventReasons(nvmlDevice_t device, u64 *reasons) {
    ENTER(device);
    *reasons = setting("reasons", 0);
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned *n,
                                                     process *found) {
    ENTER(device);
    return nvmlDeviceGetComputeRunningProcesses_v2(device, n, found);
}
#endif
