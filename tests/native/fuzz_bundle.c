/* fuzz_bundle.c: manifests. What is taken must be usable without further checks: every version is found, lies inside its
 * file, and its parts lie inside its payload. */
#include <stdlib.h>

#include "../../sti_runtime/native/formats.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool holds) {
  if (!holds) abort();
}

static void check_version(const Manifest *manifest, const Region *region, const Version *version) {
  PayloadLayout layout;
  payload_layout(&manifest->model, region->fidelity, version->outliers, &layout);
  require(layout.payload_bytes == version->payload_bytes && version->payload_bytes <= version->length);
  for (int i = 0; i < layout.planes; i++)
    require(layout.plane_offset[i] >= 0 &&
            layout.plane_offset[i] + layout.stream * layout.plane_bits[i] / 8 <= version->length);
  for (int i = 0; i < STI_MATRICES; i++)
    require(layout.outlier_offset[i] + 8 * (int64_t)version->outliers[i] <= version->length);
  require(version->offset + version->length <= manifest_file_bytes(manifest, region->file));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  Arena arena = {0};
  Manifest manifest;
  StiError error = {0};
  StiCode code = manifest_parse(&arena, (const char *)data, size, "manifest.json", &manifest, &error);
  if (code == STI_OK) code = manifest_check(&arena, &manifest, "manifest.json", &error);
  require((code == STI_OK) == (error.what[0] == '\0'));
  for (int32_t i = 0; code == STI_OK && i < manifest.region_count; i++) {
    const Region *region = &manifest.regions[i];
    for (int layer = 0; layer < manifest.model.layers; layer++) {
      for (int slice = 0; slice < manifest.model.heads; slice++)
        check_version(&manifest, region, manifest_version(&manifest, layer, slice, region->fidelity));
    }
  }
  arena_free(&arena);
  return 0;
}
