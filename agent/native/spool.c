/* spool.c: see spool.h. */
#include "spool.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

const char *const spool_owned[] = {"bundles", "tasks", "incoming", "jobs", "locks", "bin", "fence.json",
                                   SETTINGS_JOURNAL, "device_id", NULL};

/* ------------------------------------------------------------------ the spool */

/* Append one component; empty ones and "." are left out, ".." stays. False when it does not fit. */
static bool add_component(char *root, const char *name, size_t length) {
  size_t end = strlen(root);
  if (length == 0 || (length == 1 && name[0] == '.')) return true;
  if (end + 1 + length > ROOT_CHARS) return false;
  root[end] = '/';
  memcpy(root + end + 1, name, length);
  root[end + 1 + length] = '\0';
  return true;
}

static bool add_components(char *root, const char *path) {
  while (*path) {
    size_t length = strcspn(path, "/");
    if (!add_component(root, path, length)) return false;
    path += length;
    path += *path == '/';
  }
  return true;
}

static bool absolute(const char *given, char root[ROOT_CHARS + 1]) {
  Path here;
  root[0] = '\0';
  if (given[0] != '/' && (getcwd(here, sizeof here) == NULL || !add_components(root, here))) return false;
  return add_components(root, given);
}

/* mkdir -p. Returns 0 or errno. */
static int make_folders(const char *folder) {
  Path path;
  snprintf(path, sizeof path, "%s", folder);
  for (char *slash = strchr(path + 1, '/');; slash = strchr(slash + 1, '/')) {
    if (slash != NULL) *slash = '\0';
    struct stat status;
    if (mkdir(path, 0777) != 0) {
      int problem = errno;
      if (stat(path, &status) != 0) return problem;
      if (!S_ISDIR(status.st_mode)) return slash == NULL ? EEXIST : ENOTDIR;
    }
    if (slash == NULL) return 0;
    *slash = '/';
  }
}

StiCode spool_open(const char *root, Spool *spool, StiError *error) {
  static const char *const folders[] = {"bundles", "tasks", "incoming", "jobs", "locks"};
  int problem = absolute(root, spool->root) ? 0 : ENAMETOOLONG;
  for (size_t i = 0; i < sizeof folders / sizeof folders[0] && problem == 0; i++) {
    Path path;
    spool_path(spool, path, "%s", folders[i]);
    problem = make_folders(path);
  }
  if (problem == 0) return STI_OK;
  return sti_fail_errno(error, STI_INPUT, problem, "Give a folder this user may write to as the device's workdir.",
                        "%.1000s: the spool cannot be made", root);
}

void spool_path(const Spool *spool, Path path, const char *format, ...) {
  size_t length = (size_t)snprintf(path, PATH_CHARS, "%s/", spool->root);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(path + length, PATH_CHARS - length, format, arguments);
  va_end(arguments);
}

void path_below(Path path, const char *folder, const char *name) { snprintf(path, PATH_CHARS, "%s/%s", folder, name); }

StiCode check_digest(const char *digest, StiError *error) {
  if (is_digest(digest)) return STI_OK;
  return sti_fail(error, STI_INPUT, "Give 64 lower-case hexadecimal digits.", "'%.80s' is not a digest.", digest);
}

/* Whether the text is one of `first` and then at most `more` of `rest`. */
static bool has_form(const char *text, const char *first, const char *rest, size_t more) {
  size_t length = strlen(text);
  return length > 0 && length <= 1 + more && strchr(first, text[0]) != NULL && strspn(text + 1, rest) == length - 1;
}

StiCode spool_job(const Spool *spool, const char *id, const char *attempt, Path folder, StiError *error) {
  static const char first[] = "abcdefghijklmnopqrstuvwxyz0123456789", rest[] = "abcdefghijklmnopqrstuvwxyz0123456789-";
  if (!has_form(id, first, rest, 63))
    return sti_fail(error, STI_INPUT, "Job ids hold a-z, 0-9 and '-', at most 64 characters.",
                    "'%.80s' is not a job id.", id);
  if (!has_form(attempt, "123456789", "0123456789", 17))
    return sti_fail(error, STI_INPUT, "Attempts count from 1.", "'%.40s' is not an attempt.", attempt);
  spool_path(spool, folder, "jobs/%s/%s", id, attempt);
  return STI_OK;
}

/* ------------------------------------------------------------------ writing */

int sync_folder(const char *folder) {
  int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return errno;
  int problem = fsync(fd) == 0 ? 0 : errno;
  close(fd);
  return problem;
}

static size_t folder_length(const char *path) {
  const char *slash = strrchr(path, '/');
  return slash == NULL ? 0 : (size_t)(slash - path);
}

int sync_folder_of(const char *path) {
  Path folder;
  snprintf(folder, sizeof folder, "%.*s", (int)folder_length(path), path);
  return sync_folder(folder);
}

int write_whole(int fd, const char *data, size_t length, int64_t offset) {
  while (length > 0) {
    ssize_t written = pwrite(fd, data, length, offset);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return written < 0 ? errno : ENOSPC;
    data += written;
    length -= (size_t)written;
    offset += written;
  }
  return 0;
}

int append_whole(int fd, const char *data, size_t length) {
  while (length > 0) {
    ssize_t written = write(fd, data, length);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return written < 0 ? errno : ENOSPC;
    data += written;
    length -= (size_t)written;
  }
  return 0;
}

/* A hidden name beside `path`: .<name>.<pid>.<kind> */
static void beside(const char *path, const char *kind, Path hidden) {
  size_t folder = folder_length(path);
  snprintf(hidden, PATH_CHARS, "%.*s/.%s.%ld.%s", (int)folder, path, path + folder + 1, (long)getpid(), kind);
}

StiCode write_atomic(const char *path, const char *data, size_t length, StiError *error) {
  Path temporary;
  beside(path, "partial", temporary);
  int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0666);
  if (fd < 0) return storage_error(error, errno, path);
  int problem = write_whole(fd, data, length, 0);
  if (problem == 0 && fsync(fd) != 0) problem = errno;
  if (close(fd) != 0 && problem == 0) problem = errno;
  if (problem == 0 && rename(temporary, path) != 0) problem = errno;
  if (problem == 0) problem = sync_folder_of(path);
  if (problem == 0) return STI_OK;
  unlink(temporary);
  return storage_error(error, problem, path);
}

bool is_full(int errno_value) { return errno_value == ENOSPC || errno_value == EDQUOT || errno_value == EFBIG; }

StiCode storage_error(StiError *error, int errno_value, const char *path) {
  if (is_full(errno_value))
    return sti_fail(error, STI_STORAGE_FULL,
                    "Free space on the device (devices clean, or other users' files), then run it again.",
                    "%s: no space left to write (%s).", path, strerror(errno_value));
  return sti_fail_errno(error, STI_INPUT, errno_value, "Check the folder's owner and permissions.",
                        "%s: cannot be written", path);
}

/* ------------------------------------------------------------------ removing */

/* Remove all that is in the folder behind `fd`, which is closed. Links are removed, not followed. 0 or errno. */
static int empty_folder(int fd) {
  DIR *stream = fdopendir(fd);
  if (stream == NULL) {
    int problem = errno;
    close(fd);
    return problem;
  }
  int problem = 0;
  struct dirent *entry;
  while (problem == 0 && (entry = readdir(stream)) != NULL) {
    const char *name = entry->d_name;
    if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0) continue;
    if (unlinkat(fd, name, 0) == 0) continue;
    problem = errno;
    if (problem != EISDIR && problem != EPERM) break;
    int below = openat(fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    problem = below < 0 ? errno : empty_folder(below);
    if (problem == 0 && unlinkat(fd, name, AT_REMOVEDIR) != 0) problem = errno;
  }
  closedir(stream);
  return problem;
}

static int remove_folder(const char *path) {
  Path doomed;
  beside(path, "removed", doomed);
  if (rename(path, doomed) != 0) return errno;
  int fd = open(doomed, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  int problem = fd < 0 ? errno : empty_folder(fd);
  if (problem == 0 && rmdir(doomed) != 0) problem = errno;
  return problem;
}

StiCode remove_whole(const char *path, StiError *error) {
  struct stat status;
  if (lstat(path, &status) != 0) return errno == ENOENT ? STI_OK : storage_error(error, errno, path);
  int problem = S_ISDIR(status.st_mode) ? remove_folder(path) : unlink(path) == 0 || errno == ENOENT ? 0 : errno;
  if (problem == 0) return STI_OK;
  return sti_fail_errno(error, STI_INPUT, problem, "Check the folder's owner and permissions.",
                        "%s: cannot be removed", path);
}

/* ------------------------------------------------------------------ looking */

bool is_folder(const char *path) {
  struct stat status;
  return stat(path, &status) == 0 && S_ISDIR(status.st_mode);
}

bool is_file(const char *path) {
  struct stat status;
  return stat(path, &status) == 0 && S_ISREG(status.st_mode);
}

int64_t file_bytes(const char *path) {
  struct stat status;
  return stat(path, &status) == 0 && S_ISREG(status.st_mode) ? status.st_size : 0;
}

static int by_bytes(const void *a, const void *b) { return strcmp(*(const char *const *)a, *(const char *const *)b); }

static StiCode read_names(Arena *arena, DIR *stream, Names *names, StiError *error) {
  size_t capacity = 0;
  struct dirent *entry;
  *names = (Names){0};
  while ((entry = readdir(stream)) != NULL) {
    if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
    if (names->count == capacity) {
      capacity = capacity ? 2 * capacity : 64;
      const char **grown = arena_alloc(arena, capacity * sizeof *grown);
      if (grown == NULL) return sti_out_of_memory(error);
      if (names->count) memcpy(grown, names->names, names->count * sizeof *grown);
      names->names = grown;
    }
    const char *name = arena_text(arena, entry->d_name, strlen(entry->d_name));
    if (name == NULL) return sti_out_of_memory(error);
    names->names[names->count++] = name;
  }
  if (names->count) qsort(names->names, names->count, sizeof names->names[0], by_bytes);
  return STI_OK;
}

StiCode list_folder(Arena *arena, const char *folder, Names *names, StiError *error) {
  DIR *stream = opendir(folder);
  if (stream == NULL)
    return sti_fail_errno(error, STI_INPUT, errno, "Check the folder's owner and permissions.", "%s: cannot be read",
                          folder);
  StiCode code = read_names(arena, stream, names, error);
  closedir(stream);
  return code;
}
