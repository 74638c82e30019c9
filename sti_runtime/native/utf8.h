/* utf8.h: one character of UTF-8 at a time. */
#ifndef STI_UTF8_H
#define STI_UTF8_H

#include <stddef.h>
#include <stdint.h>

/* Bytes of the character at text; if there is no valid one, minus the bytes to skip (those that began it). left > 0. */
static inline int utf8_sequence(const char *text, size_t left) {
  const unsigned char *byte = (const unsigned char *)text;
  unsigned char lead = byte[0];
  if (lead < 0x80) return 1;
  if (lead < 0xC2 || lead > 0xF4) return -1;
  int length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  /* The second byte's range excludes overlong forms, surrogates and what is beyond U+10FFFF. */
  unsigned char least = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  unsigned char most = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  for (int i = 1; i < length; i++) {
    if ((size_t)i >= left || byte[i] < least || byte[i] > most) return -i;
    least = 0x80, most = 0xBF;
  }
  return length;
}

/* Write one character; returns its bytes. */
static inline int utf8_put(char *text, uint32_t code) {
  if (code < 0x80) return text[0] = (char)code, 1;
  int length = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
  for (int i = length - 1; i > 0; i--, code >>= 6) text[i] = (char)(0x80 | (code & 0x3F));
  text[0] = (char)(0xF0 << (4 - length) | code);
  return length;
}

#endif
