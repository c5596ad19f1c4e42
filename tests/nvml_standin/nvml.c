/* A stand-in for libnvidia-ml.so.1: NVML's ABI over a control file, so that the real pynvml makes
 * its real calls on a machine without a GPU.
 *
 * The file that NVML_STANDIN names holds lines "KEY VALUE", read anew at each call:
 *   devices N                how many GPUs there are (1)
 *   error.FUNCTION CODE      FUNCTION returns CODE; error.INDEX.FUNCTION for one device only
 *   hang.FUNCTION 1          FUNCTION does not return while the line is there
 *   energy.INDEX MILLIJOULES the counter; without it, it rises with 300 W
 *   reasons BITS, power MILLIWATTS
 * Compiled with -DOLD_DRIVER, the functions that newer drivers brought are not there.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef int nvmlReturn_t;
typedef struct device { unsigned index; } *nvmlDevice_t;
enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2 };

static struct device devices[16];
static int initialised;
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

static int control(const char *key, unsigned long long *value) {
    const char *path = getenv("NVML_STANDIN");
    FILE *file = path && *path ? fopen(path, "r") : NULL;
    char line[160], found[128];
    unsigned long long number;
    int yes = 0;
    if (!file) return 0;
    while (fgets(line, sizeof line, file))
        if (sscanf(line, "%127s %llu", found, &number) == 2 && !strcmp(found, key)) {
            *value = number;
            yes = 1;
        }
    fclose(file);
    return yes;
}

static unsigned long long setting(const char *key, unsigned long long otherwise) {
    unsigned long long value = otherwise;
    control(key, &value);
    return value;
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
    }
    if (code == SUCCESS && !initialised && strcmp(function, "nvmlInitWithFlags"))
        code = UNINITIALIZED;
    return code;
}

#define ENTER(device) \
    do { nvmlReturn_t code = enter(__func__, device); if (code != SUCCESS) return code; } while (0)

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

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned *n) {
    ENTER(NULL);
    *n = (unsigned)setting("devices", 1);
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *device) {
    if (index >= 16) return INVALID_ARGUMENT;
    devices[index].index = index;
    ENTER(&devices[index]);
    *device = &devices[index];
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned length) {
    ENTER(device);
    snprintf(name, length, "Stand-in GPU %u", device->index);
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned length) {
    ENTER(device);
    snprintf(uuid, length, "GPU-00000000-0000-0000-0000-00000000000%x", device->index);
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t device, unsigned long long *mj) {
    struct timespec now;
    char key[32];
    ENTER(device);
    clock_gettime(CLOCK_MONOTONIC, &now);
    snprintf(key, sizeof key, "energy.%u", device->index);
    if (!control(key, mj))
        *mj = 300000ULL * (unsigned long long)now.tv_sec
            + 300ULL * (unsigned long long)now.tv_nsec / 1000000ULL;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t device, unsigned *milliwatts) {
    ENTER(device);
    *milliwatts = (unsigned)setting("power", 250000);
    return SUCCESS;
}

typedef struct { unsigned long long total, free, used; } memory_v1;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2;

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

nvmlReturn_t nvmlDeviceGetCurrentClocksThrottleReasons(nvmlDevice_t device,
                                                       unsigned long long *reasons) {
    ENTER(device);
    *reasons = setting("reasons", 0);
    return SUCCESS;
}

#ifndef OLD_DRIVER
typedef struct { unsigned version; int sensor; int celsius; } temperature_v1;

nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, memory_v2 *memory) {
    ENTER(device);
    if (memory->version != (sizeof *memory | 2U << 24)) return 25; /* version mismatch */
    memory->total = 80ULL << 30;
    memory->reserved = 1ULL << 30;
    memory->used = 60ULL << 30;
    memory->free = memory->total - memory->used - memory->reserved;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetTemperatureV(nvmlDevice_t device, temperature_v1 *temperature) {
    ENTER(device);
    temperature->celsius = 65;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetCurrentClocksEventReasons(nvmlDevice_t device,
                                                    unsigned long long *reasons) {
    ENTER(device);
    *reasons = setting("reasons", 0);
    return SUCCESS;
}
#endif
