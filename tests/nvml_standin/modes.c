/* The stand-in with what `agent doctor` asks a driver besides: persistence mode, ECC, version.
 *
 * More lines of the control file:
 *   persistence 0|1          persistence mode (1)
 *   ecc.uncorrected N        memory errors since the driver was loaded (0)
 */
#include "nvml.c"

nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned length) {
    ENTER(NULL);
    snprintf(version, length, "580.65.06");
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetPersistenceMode(nvmlDevice_t device, unsigned *mode) {
    ENTER(device);
    *mode = (unsigned)setting("persistence", 1);
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetEccMode(nvmlDevice_t device, unsigned *now, unsigned *pending) {
    ENTER(device);
    *now = *pending = 1;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetTotalEccErrors(nvmlDevice_t device, int type, int counter,
                                         unsigned long long *errors) {
    ENTER(device);
    (void)counter;
    *errors = type == 1 ? setting("ecc.uncorrected", 0) : 0;
    return SUCCESS;
}
