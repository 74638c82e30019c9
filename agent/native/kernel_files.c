/* kernel_files.c: see kernel_files.h. */
#include "kernel_files.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../../sti_runtime/native/utf8.h"

KernelRoots kernel_roots = {.sys = "/sys", .proc = "/proc", .etc = "/etc", .android = ""};

/* ------------------------------------------------------------------ text */

char *stripped(char *text) {
  while (isspace((unsigned char)*text)) text++;
  size_t length = strlen(text);
  while (length && isspace((unsigned char)text[length - 1])) text[--length] = '\0';
  return text;
}

char *next_line(char **rest) {
  if (*rest == NULL || **rest == '\0') return NULL;
  char *line = *rest;
  *rest = strchr(line, '\n');
  if (*rest != NULL) *(*rest)++ = '\0';
  return line;
}

char *split_line(char *line, char separator) {
  char *value = strchr(line, separator);
  if (value == NULL) return NULL;
  *value++ = '\0';
  char *key = stripped(line);
  memmove(line, key, strlen(key) + 1);
  return stripped(value);
}

bool parse_int(const char *text, int64_t *value) {
  while (isspace((unsigned char)*text)) text++;
  const char *digits = text + (*text == '-' || *text == '+');
  if (!isdigit((unsigned char)*digits)) return false;
  char *end;
  errno = 0;
  long long parsed = strtoll(text, &end, 10);
  while (isspace((unsigned char)*end)) end++;
  if (errno != 0 || *end != '\0') return false;
  *value = parsed;
  return true;
}

void make_utf8(char *text) {
  for (size_t left = strlen(text); left > 0;) {
    int length = utf8_sequence(text, left);
    if (length < 0) *text = '?';
    if (length < 0) length = 1;
    text += length;
    left -= (size_t)length;
  }
}

/* ------------------------------------------------------------------ files */

static bool read_text(char *text, size_t size, const char *path) {
  int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return false;
  size_t length = 0;
  ssize_t got;
  while (length + 1 < size && (got = read(fd, text + length, size - 1 - length)) != 0) {
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      close(fd);
      return false;
    }
    length += (size_t)got;
  }
  close(fd);
  text[length] = '\0';
  char *begin = stripped(text);
  memmove(text, begin, strlen(begin) + 1);
  make_utf8(text);
  return true;
}

bool kernel_text(char *text, size_t size, const char *format, ...) {
  char path[PATH_MAX];
  va_list arguments;
  va_start(arguments, format);
  int length = vsnprintf(path, sizeof path, format, arguments);
  va_end(arguments);
  return length > 0 && (size_t)length < sizeof path && read_text(text, size, path);
}

bool kernel_int(int64_t *value, const char *format, ...) {
  char path[PATH_MAX], text[64];
  va_list arguments;
  va_start(arguments, format);
  int length = vsnprintf(path, sizeof path, format, arguments);
  va_end(arguments);
  return length > 0 && (size_t)length < sizeof path && read_text(text, sizeof text, path) && parse_int(text, value);
}

/* ------------------------------------------------------------------ folders */

static int by_name(const void *a, const void *b) { return strcmp(a, b); }

static int by_length_and_name(const void *a, const void *b) {
  size_t x = strlen(a), y = strlen(b);
  return x != y ? (x < y ? -1 : 1) : strcmp(a, b);
}

int list_entries(const char *folder, const char *prefix, bool by_length, EntryName *names, int cap) {
  DIR *stream = opendir(folder);
  if (stream == NULL) return 0;
  int count = 0;
  struct dirent *entry;
  while (count < cap && (entry = readdir(stream)) != NULL) {
    size_t length = strlen(entry->d_name);
    if (entry->d_name[0] == '.' || length >= ENTRY_NAME || strncmp(entry->d_name, prefix, strlen(prefix)) != 0)
      continue;
    memcpy(names[count++], entry->d_name, length + 1);
  }
  closedir(stream);
  qsort(names, (size_t)count, sizeof names[0], by_length ? by_length_and_name : by_name);
  return count;
}
