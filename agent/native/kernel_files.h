/* kernel_files.h: the small files below /sys, /proc and the like, as text and integers; none needs root. */
#ifndef AGENT_KERNEL_FILES_H
#define AGENT_KERNEL_FILES_H

#include "../../sti_runtime/native/base.h"

enum { KERNEL_TEXT = 65536, ENTRY_NAME = 80, ENTRIES = 256 };

/* Where the trees begin; tests point them at captured files. */
typedef struct { const char *sys, *proc, *etc, *android; } KernelRoots;
extern KernelRoots kernel_roots;

/* The first size − 1 bytes of a file, without white space around, valid UTF-8 throughout; false if it cannot be read. */
bool kernel_text(char *text, size_t size, const char *format, ...) __attribute__((format(printf, 3, 4)));
bool kernel_int(int64_t *value, const char *format, ...) __attribute__((format(printf, 2, 3)));

bool parse_int(const char *text, int64_t *value); /* the whole text, white space around it allowed */

/* Names in a folder that begin with `prefix`, sorted by name, or by length and then name. Returns their number. */
typedef char EntryName[ENTRY_NAME];
int list_entries(const char *folder, const char *prefix, bool by_length, EntryName *names, int cap);

/* The next line of a text, NUL-terminated in place; *rest moves on. NULL at the end. */
char *next_line(char **rest);
/* Cut "key <separator> value" in two, white space removed around both; NULL if there is no separator. */
char *split_line(char *line, char separator);
char *stripped(char *text); /* white space removed around, in place */
void make_utf8(char *text); /* what goes into a record must be UTF-8: bytes that are not become '?' */

#endif
