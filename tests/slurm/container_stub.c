/* A SPANK plugin that knows pyxis's flags, so that srun takes them, and writes down what it was
 * given. Containers it has none. */
#include <stdio.h>
#include <slurm/spank.h>

SPANK_PLUGIN(container_stub, 1)

static int note(int which, const char *value, int remote);

static struct spank_option options[] = {
    {"container-image", "NAME", "", 1, 0, note},
    {"container-mounts", "LIST", "", 1, 1, note},
    {"container-workdir", "PATH", "", 1, 2, note},
    {"no-container-mount-home", NULL, "", 0, 3, note},
    SPANK_OPTIONS_TABLE_END,
};

static int note(int which, const char *value, int remote) {
    FILE *file;
    if (remote) /* on the nodes it is said once more */
        return 0;
    file = fopen(NOTES, "a");
    if (file == NULL)
        return -1;
    fprintf(file, "%s=%s\n", options[which].name, value ? value : "");
    return fclose(file);
}

int slurm_spank_init(spank_t spank, int argc, char **argv) {
    struct spank_option *option;
    for (option = options; option->name != NULL; option++)
        if (spank_option_register(spank, option) != ESPANK_SUCCESS)
            return -1;
    return 0;
}
